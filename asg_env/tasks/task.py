"""What a task hands to the environment."""

from collections.abc import Mapping
from dataclasses import dataclass

from asg_env.core.data import Split
from asg_env.core.layer_groups import GroupPatterns
from asg_env.core.optimizee import Optimizee


@dataclass(frozen=True)
class Task:
    """A synthetic-to-real problem, loaded.

    Attributes:
        id: Environment id, such as `ASG/Digits-v0`.
        summary: One line for people.
        optimizee: Pretrained network; its head is drawn afresh by each instance.
        layer_groups: Group name to parameter pattern, input to head.
        splits: `train` and `inner_valid` (synthetic), `outer_valid` and `test` (real), and
            `old_task`: held-out images of the pretraining task where there are any, else real
            images without their labels, on which the old head should still agree with the
            teacher. `train` is always there.
        digest: SHA-256 of the images, or of what identifies them; and of a pretrained network that
            is neither shipped nor a package's.
        reference_digest: That of the images which the teacher and the docs' figures were made
            with; another one means another version of a drawing library. None where the images
            are the user's own.
    """

    id: str
    summary: str
    optimizee: Optimizee
    layer_groups: GroupPatterns
    splits: Mapping[str, Split]
    digest: str
    reference_digest: str | None
