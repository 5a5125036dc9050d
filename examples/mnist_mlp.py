# SPDX-License-Identifier: Apache-2.0
"""The smallest training script: an MLP of MNIST's size, Adam, and one object that trains and saves.

    python examples/mnist_mlp.py

Start it again to resume; kill it whenever you like. The images are random numbers: nothing is downloaded.
"""

import torch
from torch import nn

from layerwise_dist import LayerwiseCheckpointTrainer

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

trainer = LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir="checkpoints/mnist_mlp")
trainer.load_checkpoint()
print(f"going on after step {trainer.completed}" if trainer.completed else "nothing is saved yet: training begins")
while trainer.completed < 200:
    trainer.zero_grad()
    images, classes = torch.randn(64, 1, 28, 28, device=device), torch.randint(10, (64,), device=device)
    loss = nn.functional.cross_entropy(model(images), classes)
    loss.backward()
    trainer.step()
    if trainer.completed % 50 == 0:
        print(f"step {trainer.completed:3d}  loss {loss.item():.4f}", flush=True)
trainer.shutdown()
