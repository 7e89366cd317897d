"""Students of fewer steps: one file a method, a loss over what a teacher's dataset holds, and the trainer of all."""
