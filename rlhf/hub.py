def check_push(a): pass
def publish(*a, **k): pass
def push_dataset(*a, **k): pass
