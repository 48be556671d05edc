"""What trainers draw from: cubes of the low-res volume, and patches of the high-res images."""
