"""How the shapes pack is made: one script a part, each resumable. See models/pack/README.md."""
