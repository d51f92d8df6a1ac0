"""Recording a call: from the hook on a layer to the value that is kept."""
