from medmom.cli import main

main()
