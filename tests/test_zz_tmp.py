import time
def test_x(warm):
    for i in range(3):
        t=time.time()
        f = warm.run("hello.py", 2)
        print(f.output, time.time()-t)
    assert 0
