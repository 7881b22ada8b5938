"""Train a small timm network on scikit-learn's digits, compress it, fine-tune it against itself, save and reload it.

python examples/compress_digits.py           about a minute on two cores
python examples/compress_digits.py --smoke   a few seconds, to see that it runs
"""

import argparse
import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm


def digits(count: int) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits, 8×8 pixels enlarged to 32×32, four fifths to train on."""
    data = load_digits()
    images = torch.nn.functional.interpolate(torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], size=32)
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(count), test_size=0.2, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    """Share of the images recognised, in percent."""
    images, labels = data.tensors
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    train, test = digits(200 if smoke else 1797)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    dense = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    dense = gm.tune(dense, loader, epochs=1 if smoke else 6, lr=0.05)
    result = gm.compress(dense, group="C8xC8", rank=1, inputs=test.tensors[0][:1])
    tuned = gm.tune(result, loader, epochs=1 if smoke else 8, lr=0.02)

    print(tuned.report)
    print(f"dense      {accuracy(dense, test):6.2f} %")
    print(f"compressed {accuracy(result.model, test):6.2f} %")
    print(f"tuned      {accuracy(tuned.model, test):6.2f} %")

    with tempfile.TemporaryDirectory() as folder:
        gm.save(tuned, folder)
        again = gm.load(folder, timm.create_model("resnet10t", num_classes=10, in_chans=1))
        assert accuracy(again, test) == accuracy(tuned.model, test)


if __name__ == "__main__":
    main()
