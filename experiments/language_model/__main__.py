from experiments import lab, language_model

lab.main(language_model)
