"""What a change costs and how much it hurts: damage, costs, latencies of single layers."""
