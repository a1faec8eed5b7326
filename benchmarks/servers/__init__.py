"""Parameter servers: how soon they go on after a kill, what a message costs, and what others' do."""
