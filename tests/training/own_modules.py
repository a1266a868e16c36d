"""A module and its data as a user writes them: they use nothing of lorasweep but `record_scores`."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import ViTConfig, ViTModel

import lorasweep


class DigitClassifier(lightning.LightningModule):
    def __init__(self, learning_rate=1e-3, layers=2, dropout=0.0, log_as="val_acc"):
        super().__init__()
        self.save_hyperparameters()
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=dropout,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.norm = torch.nn.BatchNorm1d(16)
        self.classifier = torch.nn.Linear(16, 10)

    def forward(self, images):
        return self.classifier(self.norm(self.vit(images).last_hidden_state[:, 0]))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log(self.hparams.log_as, (self(images).argmax(-1) == labels).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        right = (self(images).argmax(-1) == labels).float()
        self.log("test_acc", right.mean())
        lorasweep.record_scores(right)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]  # after each epoch


class Digits(lightning.LightningDataModule):
    """Splits at random without a seed, as many do."""

    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
        self.train, self.val, self.test = random_split(data, [0.7, 0.15, 0.15])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=256)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=256)
