"""Make an adapter smaller, tell what that cost, and merge two into one: from the factors, without a base model."""

# %% What is in it
# Norms, ranks and spikes of each module's ΔW. Half of the rank is hardly used: 90 % of the energy is in few directions.
from spectral_fast import Adapter, embedded
from spectral_fast.toolbox import (
    ClipOptions,
    MergeOptions,
    ResizeOptions,
    clip_adapter,
    compare_adapters,
    export_adapter,
    inspect_adapter,
    merge_adapters,
    resize_adapter,
)

adapter = Adapter.open(embedded.adapter_dir())
for name, found in list(inspect_adapter(adapter).items())[:3]:
    row = found.row()
    print(f"{name}: r {row['r']}, |ΔW| {row['frobenius']:.2f}, 90 % of the energy in {row['rank_90']} directions")

# %% Resize
# To one rank, or to the ranks that keep a share of the energy; each module tells its error.
fixed = resize_adapter(adapter, ResizeOptions(rank=8), "r8")
energy = resize_adapter(adapter, ResizeOptions(energy=0.95), "energy")
print(f"rank 8: error up to {max(module.error for module in fixed.values()):.1%}")
print(f"95 % of the energy: ranks {sorted({module.kept for module in energy.values()})}")

# %% Compare
# Relative difference and cosine of the two ΔW, and how far their leading directions coincide.
difference = compare_adapters(adapter, Adapter.open("r8"), directions=4)
name, worst = max(difference.modules.items(), key=lambda item: item[1].relative)
print(f"most in {name}: {worst.relative:.1%}, cosine {worst.cosine:.3f}, overlap of 4 directions {worst.overlap_u:.3f}")
assert abs(worst.relative - max(module.error for module in fixed.values())) < 0.01  # bfloat16 rounds the difference

# %% Merge
# Adapters of different ranks, exactly (`cat`) or truncated (`svd`). Here an adapter and a clipped copy of it.
clip_adapter(adapter, ClipOptions(multiple=5), "clipped")
sources = [Adapter.open("r8"), Adapter.open("clipped")]
exact = merge_adapters(sources, [0.5, 0.5], MergeOptions(method="cat"), "cat")
small = merge_adapters(sources, [0.5, 0.5], MergeOptions(method="svd", rank=16), "merged")
print(f"cat: rank {max(module.r for module in exact.values())}, error {max(m.error for m in exact.values()):.1%}")
print(f"svd: rank 16, error up to {max(module.error for module in small.values()):.1%}")

# %% For loaders that know one rank and one scaling
export_adapter(Adapter.open("merged"), "exported")
plain = Adapter.open("exported")
print(f"r {plain.config['r']}, lora_alpha {plain.config['lora_alpha']}, patterns {plain.config.get('rank_pattern')}")
