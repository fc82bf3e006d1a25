"""Galleries: what is indexed, the embeddings of it, and the search in them."""
