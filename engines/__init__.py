"""What embeds bundles elsewhere, and the devices that engines are made for."""
