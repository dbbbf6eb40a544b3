"""The command foundry-ext."""
