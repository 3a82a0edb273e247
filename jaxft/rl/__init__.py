"""Rollouts, rewards and advantages.

trajectory.py: episodes as segments of token ids: sampled (with a loss) or given, such as a tool's results
    (without a loss)
episodes.py: the loop that plays episodes; the interface to what samples: rows that can be continued
rollout_source.py: the source of rollouts, from prompts to batches
online_pairs.py: pairs for online DPO: the best and the worst episode of each prompt
rewards.py: the Reward type, functions as rewards, functions that check an answer
reward_models.py: reward models as rewards
advantages.py: advantages of groups; penalties of rewards (overlong, no end token) and clipping
token_weights.py: weights of tokens in the loss: GRPO, DAPO, Dr. GRPO; importance weights: TIS, MIS
estimators.py: GAE and REINFORCE++
rollout_sampler.py: episodes sampled with the engine; rollouts in files, to read and to replay to the bit
rollout_layout.py: rows of tokens with the positions that have a loss, made of episodes; passes of a run's
    model over these, and values of sampled tokens back
rollout_metrics.py: metrics of a rollout
rollout_rules.py: how completions are scored, which are trained on, with which advantages and weights
environments/: environments, tools, the sandbox
"""
