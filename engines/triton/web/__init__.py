"""A web page that shows frames as a server makes them."""
