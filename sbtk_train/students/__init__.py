"""The networks: trunks, students, their teachers, and embeddings fitted anew."""
