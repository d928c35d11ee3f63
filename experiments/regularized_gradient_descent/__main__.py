from experiments import lab, regularized_gradient_descent

lab.main(regularized_gradient_descent)
