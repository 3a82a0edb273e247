"""Rollouts, rewards and advantages."""
