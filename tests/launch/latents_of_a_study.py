"""What `encoder=FOLDER` sets, for plans of the studies that need a cache of latents."""

SETTINGS = ["encoder.kind=latents", "encoder.identity=0123456789ab", "encoder.scale=0.18215", "encoder.shift=0.0"]
SETTINGS += ["encoder.channels=4", "encoder.side=32", "model.in_channels=4", "model.input_size=32"]
SETTINGS += ["data=folder", "data.size=256", "data.num_classes=1000"]
NEEDED = {"guidance_latents": SETTINGS}
