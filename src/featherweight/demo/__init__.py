"""The main job on scikit-learn's digits, end to end."""
