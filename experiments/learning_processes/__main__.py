from experiments import lab, learning_processes

lab.main(learning_processes)
