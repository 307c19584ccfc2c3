"""What `python -m benchmarks` measures: a module a section, whose `rows` yields its comparisons."""

# minutes that a section takes on two quiet CPU cores
SECTIONS = {
    "training": 7.5,
    "inference": 3.0,
    "memory": 1.2,
    "classes": 1.5,
    "data": 1.0,
    "evaluation": 0.7,
    "startup": 0.8,
    "attention": 0.5,
}
ON_GPU = ("attention",)  # measured by default on a GPU alone
