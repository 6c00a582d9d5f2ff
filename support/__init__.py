"""What a reader of the paper never needs: weights, drawing, boxes, pictures, what scripts share."""
