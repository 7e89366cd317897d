"""Students of fewer steps: one file a method, each a loss over what a teacher's dataset holds, and the trainer of them all."""
