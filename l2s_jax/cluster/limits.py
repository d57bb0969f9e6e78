"""How long the processes of a job wait for each other. Needs no JAX: flags have the defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """In seconds.

    Attributes:
      join_s: how long process 0 waits for the others to join; they wait twice as long for it.
      heartbeat_s: how long a process may give no sign of life.
      barrier_s: how long processes wait for one that is late. Process 0 may train a tokenizer or
        measure for hours while the others wait.
    """

    join_s: int = 300
    heartbeat_s: int = 40
    barrier_s: int = 7 * 24 * 3600
