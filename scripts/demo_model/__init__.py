"""Parts of the demo model's training recipe; scripts/train_demo_model.py puts them together."""
