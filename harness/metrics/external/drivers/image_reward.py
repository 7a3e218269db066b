"""ImageReward-v1.0 by the package image-reward."""

from exchange import package, serve

reward = package("ImageReward")
model = reward.load("ImageReward-v1.0")
serve(lambda image, prompt: model.score(prompt, image), "ImageReward-v1.0")
