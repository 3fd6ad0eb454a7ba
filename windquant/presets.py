"""What the presets of the settings stand for, without importing torch: the estimate asks too."""

#: Distillation steps. On two cores of an EPYC a step of the embedded model takes 1.2 to 2 seconds.
RECOVERY_STEPS = {"light": 80, "standard": 400, "full": 2000}
#: Tokens of the calibration set that plans are quantized with when they are compared.
CONFIRM_TOKENS = 4096
#: Logits in memory where divergences are computed, 24 MiB in FP32: 128 positions of the embedded model's vocabulary.
#: Blocks of that size stay with the process (memory.KEPT).
DIVERGENCE_LOGITS = 6 << 20
#: Of learned rounding: windows of a batch, batches that the steps take in turn, batches that judge a layer (at most a
#: quarter of all), and how often they do.
ROUNDING_BATCH, ROUNDING_BATCHES, ROUNDING_JUDGES, ROUNDING_CHECKS = 4, 32, 4, 5


def recovery_steps(preset: str, steps: int | None) -> int:
    """Distillation steps: as many as were asked for, else the preset's."""
    return RECOVERY_STEPS[preset] if steps is None else steps
