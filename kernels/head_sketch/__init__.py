"""TensorSketch of the head's gradient: z = Σ_t s_h(t) ⊛ s_e(t) over the tokens of a batch.

The gradient of the output embedding is Σ_t e_t h_tᵀ, with h_t the state that enters it and e_t = softmax(logits_t) −
onehot(gold). Its inner product with another batch's is estimated by ⟨z, z'⟩, without bias: s_h and s_e are
CountSketches of h_t and of e_t, kept at the largest logits and the gold one, and ⊛ is the circular convolution of
length m.

Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps", KDD 2013.
"""

from spectral_fast.kernels.head_sketch.hashes import Hashes
from spectral_fast.kernels.head_sketch.op import IGNORED, Top, head_sketch, head_sketch_from_weight, top_logits

__all__ = ["IGNORED", "Hashes", "Top", "head_sketch", "head_sketch_from_weight", "top_logits"]
