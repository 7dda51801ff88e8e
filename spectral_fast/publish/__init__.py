"""An adapter on the Hugging Face hub: its model card, and the upload."""

from spectral_fast.publish.upload import Upload, push_to_hub

__all__ = ["Upload", "push_to_hub"]
