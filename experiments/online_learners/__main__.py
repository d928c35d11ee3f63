from experiments import lab, online_learners

lab.main(online_learners)
