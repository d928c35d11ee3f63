from experiments import lab, meta_optimizer

lab.main(meta_optimizer)
