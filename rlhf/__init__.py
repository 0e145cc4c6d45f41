"""What the recipes compose: data, models, feedback, rewards, the PPO trainer and the Hub."""
