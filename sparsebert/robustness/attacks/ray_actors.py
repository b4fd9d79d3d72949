"""Workers of an attack on a Ray cluster. Every node must have this package, and the model and resources at the same
paths; results do not depend on the node, or the attack is refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsebert import environment
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError, SparsebertError, SparsebertWarning, UnsupportedError, first_line
from sparsebert.robustness.attacks.crew import TICK, Lost, Told
from sparsebert.robustness.attacks.plan import Done, Plan, Unit, Victim, attacked, plans
from sparsebert.robustness.attacks.recipes import named

environment.send_no_usage()

import ray  # noqa: E402  which reads what that sets
from ray.exceptions import RayActorError, RayError  # noqa: E402

PATIENCE = 60.0  # seconds in which actors begin if there are CPUs for them
PATHS = ("neighbours", "sentence_encoder", "masked_lm", "stored")  # fields of AttackConfig that may be files


class Actors:
    """Actors on the Ray cluster of RAY_ADDRESS, else on the one that runs here, else on one that is begun and ended
    here. They share the cores of the cluster, or its GPUs.
    """

    def __init__(self, victim: Victim, plan: Plan):
        self._began = not ray.is_initialized()
        if self._began:
            ray.init(log_to_driver=False, logging_level="error")
        self._actors: list = []
        self._work: dict = {}
        try:
            self._begin(victim, plan)
        except BaseException:
            self.close()
            raise

    def _begin(self, victim: Victim, plan: Plan) -> None:
        config, device = plan.config, victim.classifier.device
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = cores_each(nodes, config.workers)
        found = {name: str(path.resolve()) for name in PATHS
                 if (value := getattr(config, name)) is not None and (path := Path(value)).exists()}  # fmt: skip
        spec = (
            str(victim.classifier.directory.resolve()), device, victim.task, victim.order, victim.temperature,
            plan.recipe.name, config.model_copy(update=found), {**victim.facts, **plan.facts},
        )  # fmt: skip
        actor = ray.remote(num_cpus=cores, num_gpus=int(device == "cuda"))(_Actor)
        self._actors += [actor.remote() for _ in range(config.workers)]
        begun = [each.begin.remote(number, cores, *spec) for number, each in enumerate(self._actors)]
        _, waiting = ray.wait(begun, num_returns=len(begun), timeout=PATIENCE)
        if waiting:
            warnings.warn(
                f"the Ray cluster is busy: waiting for {cores} free CPUs for each of {len(waiting)} actors",
                SparsebertWarning,
                stacklevel=2,
            )
        try:
            ray.get(begun)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, SparsebertError):
                raise cause from error
            raise UnsupportedError(
                f"an actor on the Ray cluster could not begin: {first_line(cause or error)}", fix="see Ray's logs"
            ) from error

    def give(self, number: int, units: list[Unit]) -> None:
        # The actor waits until what it told was heard, which is before it is in the ledger: one example more is lost.
        told = {"num_returns": "streaming", "_generator_backpressure_num_objects": 1}
        self._work[number] = self._actors[number].attack.options(**told).remote(units)

    def told(self, numbers: Sequence[int]) -> list[int]:
        streams = [self._work[number] for number in numbers]
        ready, _ = ray.wait(streams, num_returns=1, timeout=TICK)
        return [number for number in numbers if self._work[number] in ready]

    def hear(self, number: int) -> Told:
        try:
            return ray.get(next(self._work[number]))
        except StopIteration:
            return None
        except RayActorError as error:
            raise Lost from error

    def close(self) -> None:
        for each in self._actors:
            ray.kill(each)
        if self._began:
            ray.shutdown()


def cores_each(nodes: Sequence[int], workers: int) -> int:
    """The most CPUs that each of these workers can have, none of them on two nodes. nodes: CPUs of each node.
    InputError if there are fewer CPUs than workers.
    """
    for cores in range(max(nodes), 0, -1):
        if sum(node // cores for node in nodes) >= workers:
            return cores
    raise InputError(f"the Ray cluster has {sum(nodes)} CPUs, asked for are {workers} workers", fix="ask for fewer")


class _Actor:
    def begin(self, number, cores, directory, device, task, order, temperature, recipe, config, facts) -> None:
        """Makes the actor ready. facts: of the victim and the plan where the attack was begun. UnsupportedError if they
        are others here, so that another thing might be found.
        """
        free = sorted(os.sched_getaffinity(0))  # Ray counts cores and assigns none
        first = number * cores % len(free)
        os.sched_setaffinity(0, (free + free)[first : first + min(cores, len(free))])
        self._victim = Victim(Classifier.load(directory, device), task, order, temperature)
        (self._plan,) = plans(named(recipe), config, task)
        here = {**self._victim.facts, **self._plan.facts}
        if differs := [name for name, value in facts.items() if here[name] != value]:
            name = differs[0]
            raise UnsupportedError(
                f"node {ray.util.get_node_ip_address()} has another {name}: {here[name]} in place of {facts[name]}",
                fix="use nodes of one kind, with the same files",
            )

    def attack(self, units: list[Unit]) -> Iterator[Done]:
        for row in attacked(self._victim, self._plan, units):
            if row is not None:
                yield row
