"""Export of training runs to verified model bundles."""

import sbtk_runtime  # noqa: F401  # before any module here imports ONNX Runtime: see there
