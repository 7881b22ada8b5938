"""The algebra alone: group matrices of D4, what projection keeps of a random and of a symmetric weight."""

import torch

import gmcompress as gm


def main() -> None:
    torch.manual_seed(0)
    group = gm.group("D4")
    print(f"{group}: order {group.order}, {'' if group.is_abelian else 'not '}abelian")
    print("quotients:", ", ".join(each.name for each in gm.groups.quotients(group)))

    random = torch.randn(16, 24, dtype=torch.float64)
    symmetric = gm.nearest(random, group)  # 2 × 3 blocks of 8 × 8 group matrices: 48 numbers in place of 384
    for name, weight in (("random", random), ("symmetric", symmetric)):
        ranks = gm.displacement_rank(weight, group), gm.generator_displacement_rank(weight, group)
        distance = gm.distance(weight, group, relative=True)
        print(f"{name:10} distance {distance:.3f}, displacement rank {ranks[0]}, of the generators {ranks[1]}")

    for rank in (0, 1, 2, 4, 7):
        fit = gm.project(random, gm.Structure.parse("D4", rank=rank))
        stored = fit.structure.parameters(random.shape)
        print(f"displacement rank {rank}: {stored:4} of {random.numel()} numbers, error {fit.relative_error:.3f}")


if __name__ == "__main__":
    main()
