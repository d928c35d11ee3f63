from experiments import lab, reproduce

lab.main(reproduce)
