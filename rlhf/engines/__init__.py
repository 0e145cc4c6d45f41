"""Engines that sample the rollouts of PPO, behind one seam: `sync` and `sample`."""
