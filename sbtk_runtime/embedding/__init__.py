"""Files to embeddings: decoded ahead of the engine, in order, in little memory."""
