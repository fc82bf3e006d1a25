"""FP16 and INT8 plans for TensorRT: built, cached, checked and run."""
