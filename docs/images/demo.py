"""Draws demo.png from the pictures of `make demo`: run it from the root of a checkout, after the demo."""

from pathlib import Path

from PIL import Image

IMAGES = Path("results/Mvfa/Phantom/Brain/latest/images/test")
SHOWN = ("Ungood/img/000.png", "Ungood/img/001.png", "good/img/000.png")
WIDTH = 720

rows = [Image.open(IMAGES / name).convert("RGB") for name in SHOWN]
height = rows[0].height * WIDTH // rows[0].width
figure = Image.new("RGB", (WIDTH, height * len(rows)))
for index, row in enumerate(rows):
    figure.paste(row.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, index * height))
figure.quantize(256, kmeans=2).save(Path(__file__).with_name("demo.png"), optimize=True)
