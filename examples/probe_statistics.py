"""Were the calibration samples enough to know which directions matter?

g is a sum over samples, and a probe keeps the parts. From these follow standard errors, a bootstrap, and a test of
whether g is more than noise around zero.
"""

# %% Probe
import torch

from spectral_fast import Adapter, CalibrationOptions, embedded, probe
from spectral_fast.statistics import Stability, agreement, bootstrap, signal, standard_error

adapter = Adapter.open(embedded.adapter_dir())
modules = adapter.select(("down_proj", "o_proj"))
base, calibration = embedded.base_model_dir(), str(embedded.calibration_file())
sensitivity = probe(adapter, modules, base, CalibrationOptions(calib_data=calibration, calib_samples=64))
parts = sensitivity.samples
assert parts is not None  # they are None where only sums were kept
name = modules[0].name
print(f"{name}: parts of g {tuple(parts[name].shape)}, samples by directions")

# %% Standard errors
# How far g would be off with other samples of the same kind.
g, error = sensitivity.modules[name].g, standard_error(parts[name])
clear = int((g.abs() > 2 * error).sum())
print(f"|g| is above two standard errors in {clear} of {len(g)} directions")

# %% Bootstrap
# In what share of resampled calibrations is a direction among the chosen? 0.95 and more would be a certain choice.
membership = bootstrap(parts, resamples=200)[name]
print(
    "largest probabilities to be core:",
    [round(p, 2) for p in membership.core.sort(descending=True).values[:4].tolist()],
)

# %% Does doubling the samples change the choice?
# Beside it what it would be by chance, from random signs: only what is above that is signal.
for found in agreement(parts, sizes=(16, 32, 64), splits=10):
    print(
        f"{found.samples:>3} samples: {found.doubling:.0%} of the choice as with half of them, by chance "
        f"{found.doubling_by_chance:.0%}; two halves agree in {found.halves:.0%}, by chance "
        f"{found.halves_by_chance:.0%}"
    )

# %% Is there any signal?
# A randomisation test. An adapter that was trained until its loss was flat has g near zero on its own training data.
p = signal(parts, draws=199)
print(f"p = {p:.3f} that g is noise around zero")
summary = Stability.of(parts).summary()
print("in the record of every probe:", sorted(summary))

# %% Take as many samples as it needs
# Until doubling them has left a share of the choice as it was; the share of 0.3 is low, to end within 64 samples.
until = CalibrationOptions(calib_data=calibration, calib_samples=64, until_stable=0.3)
stable = probe(adapter, modules, base, until)
used = stable.record["samples_used"]
print(f"{used} samples were used; stable: {stable.record['stable']}")
plain = probe(adapter, modules, base, CalibrationOptions(calib_data=calibration, calib_samples=used))
torch.testing.assert_close(stable.modules[name].g, plain.modules[name].g)  # as if that number had been asked for
