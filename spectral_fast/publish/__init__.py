"""An adapter on the Hugging Face hub: its model card, and the upload."""

from spectral_fast.publish.card import model_card
from spectral_fast.publish.upload import Publication, push_to_hub

__all__ = ["Publication", "model_card", "push_to_hub"]
