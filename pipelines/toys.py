TOYS = {}
