"""What a trained model looked at: hit rates, overlays, curves, and the HTML report of the demo."""
