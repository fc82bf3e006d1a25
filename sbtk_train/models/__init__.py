"""Students, their backbones and the teacher."""
