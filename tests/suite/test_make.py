def test_x(new_machine):
    m=new_machine()
    r=m.make("verify"); print(r.stdout, r.stderr); assert r.returncode==0
    assert m.left()
    r=m.make("clean"); print(r.stdout,r.stderr)
    assert m.left()==[]
