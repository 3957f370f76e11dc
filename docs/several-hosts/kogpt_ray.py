"""Continues prompts on several nodes of a Ray cluster: one actor a node, each with the GPUs that it is given.

    python kogpt_ray.py --model /models/kogpt --mesh d1p2t8 --actors 2 --gpus 8 --prompt "이 영화는"

Ray starts one on this machine where none runs (`RAY_ADDRESS`). Where an actor dies, the others end by themselves, and
the call in progress raises `ray.exceptions.RayActorError`.
"""

import argparse
import socket

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote
class Process:
    """One of the processes that run the model together."""

    def free_address(self) -> str:
        """Where this actor can serve the others."""
        with socket.create_server(("", 0)) as server:
            return f"{ray.util.get_node_ip_address()}:{server.getsockname()[1]}"

    def load(self, coordinator: str, num_processes: int, process_id: int, model: str, mesh: str) -> None:
        from kogpt_jax import KoGPT, distributed  # here: the driver needs neither JAX nor a GPU

        distributed.initialize(coordinator, num_processes, process_id)
        self.model = KoGPT.from_pretrained(model, mesh=mesh)

    def generate(self, prompts: list[str], max_new_tokens: int) -> list[str | None]:
        """All actors are called with the same, and return the same."""
        from kogpt_jax import SamplingParams

        return [each.text for each in self.model.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue prompts on several nodes of a Ray cluster.")
    parser.add_argument("--model", default="demo", help="a directory that every node sees, or 'demo'")
    parser.add_argument("--mesh", default="d1p1t2", help="over the devices of all actors")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of an actor")
    parser.add_argument("--gpus", type=float, default=0, help="of an actor")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompt", action="append", required=True)
    options = parser.parse_args()

    ray.init()
    bundle = {"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})}
    group = placement_group([bundle] * options.actors, strategy="SPREAD")  # over the nodes, where there are several
    ray.get(group.ready())
    actors = [
        Process.options(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(options.actors)
    ]
    coordinator = ray.get(actors[0].free_address.remote())
    ray.get(
        [
            actor.load.remote(coordinator, len(actors), index, options.model, options.mesh)
            for index, actor in enumerate(actors)
        ]
    )
    texts, *_ = ray.get([actor.generate.remote(options.prompt, options.max_new_tokens) for actor in actors])
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    main()
