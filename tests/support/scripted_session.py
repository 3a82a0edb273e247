"""A Session without a model: a function of the row's tokens so far writes the turns."""

import numpy as np

from jaxft.engine.session import Sampled


class ScriptedSession:
    """write(ids, number) -> (token ids, whether the stop token was sampled), where ids are all of the row so
    far. rows: the ids of each row that was dropped, as (episode, ids). at_once: turns that end together.
    """

    def __init__(self, write, at_once=3):
        self.write, self.at_once = write, at_once
        self.ids, self.queue, self.dropped, self.numbers = {}, [], [], {}

    def start(self, prompt, episodes, number, max_new):
        for index, episode in enumerate(episodes):
            assert episode not in self.ids, "the episode's row is in use"
            self.ids[episode] = list(prompt)
            self.numbers[episode] = (number, index)
            self.queue.append((episode, max_new))
        taken = [self.numbers[e] for e in self.ids]
        assert len(set(taken)) == len(taken), "two rows share a key"

    def extend(self, episode, tokens, max_new):
        assert episode not in [e for e, _ in self.queue], "the turn has not ended"
        self.ids[episode] += list(tokens)
        self.queue.append((episode, max_new))

    def drop(self, episode):
        self.dropped.append((episode, self.ids.pop(episode)))
        self.queue = [(e, n) for e, n in self.queue if e != episode]

    def wait(self):
        now, self.queue = self.queue[: self.at_once], self.queue[self.at_once :]
        found = []
        for episode, max_new in now:
            assert max_new > 0
            tokens, stopped = self.write(self.ids[episode], episode)
            cut = len(tokens) > max_new
            tokens = list(tokens[:max_new])
            self.ids[episode] += tokens
            logps = np.linspace(-1, -2, len(tokens), dtype=np.float32)
            found.append(
                Sampled(episode, np.array(tokens), logps, "stop" if stopped and not cut else "length")
            )
        return found


class ScriptedSampler:
    def __init__(self, write, at_once=3):
        self.opened = ScriptedSession(write, at_once)

    def __call__(self, key):
        return self.opened
