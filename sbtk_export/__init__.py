"""From a training run to a verified model bundle."""

import sbtk_runtime  # noqa: F401  # before any module here imports ONNX Runtime: see there
